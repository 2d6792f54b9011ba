"""Python blocks that are one program."""

import pytest

from tests.docs.markdown import blocks
from tests.docs.runner import PageError, programs

PAGE = """
```python
a = 1
```

```text
between
```

<!-- goes on -->
```python
assert a == 1
```
"""


def _read(tmp_path, text):
    (tmp_path / "p.md").write_text(text)
    return blocks(tmp_path / "p.md", "p.md")


def test_they_are_joined_in_order(tmp_path):
    python, text = programs(_read(tmp_path, PAGE))
    exec(python.text)
    assert python.text.index("a = 1") < python.text.index("assert") and text.language == "text"


def test_there_is_something_to_go_on_from(tmp_path):
    with pytest.raises(PageError, match="go on from"):
        programs(_read(tmp_path, "<!-- goes on -->\n```python\na = 1\n```\n"))
    with pytest.raises(ValueError, match="directly above"):
        _read(tmp_path, "<!-- goes on -->\ntext\n")
