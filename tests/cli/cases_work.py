"""Working folder, threads, reports and examples: (command, exit code, sentence)."""

CASES = [
    ("unet.pt {two} --threads 0", 2, "threads: got 0, must be at least 1"),
    ("unet.pt {two} --memory much", 2, "memory: got 'much', expected a size such as 4GB, 512MiB or 1.5GB"),
    ("unet.pt {two} --workdir none/work", 10, "cannot work in none/work: No such file or directory; name a writable folder with --workdir"),
    ("unet.pt {two} --workdir .", 10, ". is neither empty nor a working folder (it holds …); name another with --workdir"),
    ("unet.pt {two} --report none/page.html", 6, "cannot write none/page.html: folder none does not exist; create it first"),
    ("report tiny.qmod -o empty", 6, "cannot write empty: it is a folder; name a file such as empty/report.html"),
    ("report tiny.qmod -o page.html --report-data unet.pt", 6, "cannot write unet.pt: it is a file; --report-data names a folder"),
    ("example digit", 2, "example: got 'digit', allowed digits"),
    ("example digits unet.pt", 2, "example: unet.pt is a file; give a folder"),
]  # fmt: skip
