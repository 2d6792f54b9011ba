"""``python -m edadm_compile``."""

from edadm_compile.cli import NAME, main

main(prog_name=NAME)
