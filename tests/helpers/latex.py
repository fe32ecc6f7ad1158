"""Compiling with LaTeX, where there is one."""

import shutil
import subprocess

import pytest

needs_latex = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs LaTeX")


def log_of(page, folder):
    """What pdflatex says of a page in `article` with booktabs and graphicx; fails where it does not compile."""
    before, after = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}", "\\end{document}"
    (folder / "t.tex").write_text(before + page + after)
    command = ["pdflatex", "-draftmode", "-halt-on-error", "t.tex"]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=120).stdout
