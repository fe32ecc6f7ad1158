"""Draw quickstart_report.png: the top of a run's report, as Chromium shows it, with positives at 1.5 times dz.

python -m docs.make_report_picture runs/quickstart      # from the repository's root
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.helpers import chromium

PATH = Path(__file__).with_name("quickstart_report.png")
WIDTH, COLOURS = 1130, 48
SCALE = "scale.value = 1.5; scale.dispatchEvent(new Event('input', {bubbles: true}))"
END = "document.getElementById('explorer').getBoundingClientRect().bottom + scrollY"


def main(run: str) -> None:
    """Draw it."""
    with tempfile.TemporaryDirectory() as folder, chromium.browser(folder) as page:
        page.call("Emulation.setDeviceMetricsOverride", width=WIDTH, height=900, deviceScaleFactor=1, mobile=False)
        page.open(Path(run, "report.html").resolve())
        page.value(SCALE)
        height = round(page.value(END))
        page.screenshot(PATH)
    Image.open(PATH).crop((0, 0, WIDTH, height)).quantize(COLOURS, dither=Image.Dither.NONE).save(PATH, optimize=True)
    print(f"{PATH}: {PATH.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1])
