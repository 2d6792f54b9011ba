"""Who is told what while a model is compiled, and what happens when a receiver raises."""

import pytest

from edadm_compile import Callbacks, compile_model
from edadm_compile.callbacks import Advanced, BlockFinished, Dispatcher, StageStarted
from edadm_compile.errors import InputError
from edadm_compile.ir.program import SamplerSpec
from tests.graphs import DDIM, TinyUNet, small_config


class Blocks(Callbacks):
    def __init__(self):
        self.seen = []

    def block_finished(self, event):
        self.seen.append(event)


@pytest.fixture(scope="module")
def told():
    events, blocks = [], Blocks()
    result = compile_model(
        TinyUNet().eval(),
        small_config(),
        sampler=SamplerSpec(DDIM, 2),
        shape=(3, 8, 8),
        callbacks=[events.append, blocks],
    )
    return result, events, blocks


def test_a_function_gets_every_event_in_order(told):
    _, events, _ = told
    assert isinstance(events[0], StageStarted) and events[0].stage == "capture"
    stages = [e.stage for e in events if isinstance(e, StageStarted)]
    assert stages.index("calibration samples") < stages.index("reconstruct") < stages.index("quality")
    running, done = "", 0
    for event in events:
        if isinstance(event, StageStarted):
            running, done = event.stage, 0
        elif isinstance(event, Advanced):
            assert event.stage == running and event.done >= done
            done = event.done
    last = [e for e in events if isinstance(e, Advanced) and e.stage == "reconstruct"][-1]
    assert last.done == last.total


def test_blocks_have_the_losses_of_the_result(told):
    result, events, blocks = told
    assert blocks.seen == [e for e in events if isinstance(e, BlockFinished)]
    units = result.stats["reconstruct"]["units"]
    assert [(b.block, b.before, b.after, b.layers) for b in blocks.seen] == [
        (u["unit"], u["before"], u["after"], u["layers"]) for u in units
    ]
    assert [b.index for b in blocks.seen] == list(range(1, len(units) + 1)) and {b.total for b in blocks.seen} == {
        len(units)
    }


def test_what_a_receiver_raises_ends_the_call_and_nothing_is_written(tmp_path):
    class Enough(Exception):
        pass

    def stop(event):
        if isinstance(event, BlockFinished):
            raise Enough(event.block)

    output = tmp_path / "a.qmod"
    output.write_bytes(b"older")
    with pytest.raises(Enough):
        compile_model(
            TinyUNet().eval(),
            small_config(),
            sampler=SamplerSpec(DDIM, 2),
            shape=(3, 8, 8),
            output=output,
            callbacks=stop,
        )
    assert output.read_bytes() == b"older" and list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    "wrong, said", [(3, "got 3"), (Blocks, "the class Blocks, not an object of it"), (["a"], "got 'a'")]
)
def test_what_cannot_receive_is_refused(wrong, said):
    with pytest.raises(InputError, match=said):
        Dispatcher(wrong)


def test_nobody_needs_to_listen():
    nobody = Dispatcher(None)
    nobody.stage("a", 3)
    nobody.advance(2, "b")


def test_a_report_without_a_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="give output= as well"):
        compile_model(
            TinyUNet().eval(), small_config(), sampler=SamplerSpec(DDIM, 2), shape=(3, 8, 8), report=tmp_path / "r.html"
        )
