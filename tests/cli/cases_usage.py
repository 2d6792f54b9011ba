"""Command lines that cannot be understood: (command, exit code, sentence)."""

CASES = [
    ("inspct tiny.qmod", 2, "'inspct' is neither a verb nor a file; did you mean 'inspect'? (see edadm-compile --help)"),
    ("compile", 2, "MODEL is missing (see edadm-compile compile --help)"),
    ("unet.pt --targts all", 2, "unknown option --targts; did you mean --targets or --restart or --iters? (see edadm-compile compile --help)"),
    ("unet.pt --method eda_dm", 2, "--method: got 'eda_dm', allowed default, eda-dm, q-diffusion, tfmq-dm, ptq4dm, minmax; did you mean 'eda-dm'? (see edadm-compile compile --help)"),
    ("unet.pt --iters many", 2, "--iters: got 'many', expected a whole number (see edadm-compile compile --help)"),
    ("unet.pt --qdrop 2", 2, "--qdrop: got 2.0, allowed 0 to 1 (see edadm-compile compile --help)"),
    ("sample tiny.qmod -n 0", 2, "-n: got 0, allowed 1 to 100000 (see edadm-compile sample --help)"),
    ("inspect tiny.qmod more", 2, "got unexpected extra argument (more) (see edadm-compile inspect --help)"),
    ("inspect tiny.qmod --quiet --verbose", 2, "--quiet and --verbose exclude each other (see edadm-compile inspect --help)"),
    ("completion bsh", 2, "SHELL: got 'bsh', allowed bash, zsh, fish; did you mean 'bash'? (see edadm-compile completion --help)"),
    ("unet.pt --scheduler", 2, "option '--scheduler' requires an argument (see edadm-compile --help)"),
    ("export tiny.qmod --onnx-target gpu", 2, "--onnx-target: got 'gpu', allowed cpu, arm, tensorrt; did you mean 'cpu'? (see edadm-compile export --help)"),
    ("evaluate tiny.qmod", 2, "--reference is missing (see edadm-compile evaluate --help)"),
    ("bench tiny.qmod --repeats 1", 2, "--repeats: got 1, allowed 2 to 10000 (see edadm-compile bench --help)"),
    ("tune tiny.qmod --budget 0", 2, "--budget: got 0.0, allowed 1 or more (see edadm-compile tune --help)"),
    ("tune tiny.qmod --prepare sm_90 --budget 5", 2, "--prepare writes no file and measures nothing: leave out -o, --budget and --table (see edadm-compile tune --help)"),
    ("unet.pt --store float8", 2, "--store: got 'float8', allowed float16, bfloat16, float32; did you mean 'float32'? (see edadm-compile compile --help)"),
    ("unet.pt --shape 3,8,8 --shape 3,16,16", 2, "--shape: got 2 shapes (3,8,8 and 3,16,16), a file holds one; compile one file for each (see edadm-compile compile --help)"),
    ("unet.pt --null-label", 2, "option '--null-label' requires an argument (see edadm-compile --help)"),
]  # fmt: skip
