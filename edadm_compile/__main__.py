"""``python -m edadm_compile``."""

from edadm_compile.cli import main

main()
