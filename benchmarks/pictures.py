"""Pictures of the README, made from real runs: `python benchmarks/pictures.py FOLDER`.

Runs the commands below in FOLDER (a run that is there already is kept), photographs the report of the
study and the page of the server with chromium.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path

from served import serving

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from serving.browser import Page, browsing  # noqa: E402

OUTPUT = ROOT / "docs" / "pictures"
LARGEST = 200_000  # bytes of a picture
SCHEMES = ("light", "dark")
SIZE = {"width": 1280, "height": 800}
TRAIN = "train --model smollm2-135m --data movie-reviews --output-dir adapters/reviews --max-steps 4 --batch-size 8"
STUDY = (
    "study rank --quick --model minilm-l6 --data movie-reviews --output-dir rank --values 2,8,32 --steps 30 --fixed-lr "
    "--batch-size 8 --max-length 64 --test-rows 100"
)
REVIEW = "Is this film review positive or negative? Answer with one word. A slow start, then a wonderful second half."
SHOWN = "document.querySelector('#stop').disabled && document.querySelectorAll('.answer dl:not([hidden])').length === 2"
# what is below them tells of the machine
STATISTICS = "Math.floor(document.querySelector('.answer dl').getBoundingClientRect().top)"


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the runs are made, or are already")
    parser.add_argument("--only", choices=("report", "page"), help="make one of them")
    given = parser.parse_args()
    folder: Path = given.folder.resolve()
    OUTPUT.mkdir(exist_ok=True)
    for name, make in {"report": report, "page": page}.items():
        if given.only in (None, name):
            make(folder)


def report(folder: Path) -> None:
    """Photograph the first screen of a study's report."""
    if not (folder / "rank" / "report.html").exists():
        run(STUDY, folder)
    photograph((folder / "rank" / "report.html").as_uri(), "report", "document.querySelector('.answer') !== null")


def page(folder: Path) -> None:
    """Photograph the page of the server while base and adapter answer the same question."""
    trained(folder)
    with serving("smollm2-135m", folder / "adapters") as told:
        asked = f"{told['url']}/?lang=en&models=smollm2-135m,reviews&max_tokens=12"
        photograph(asked, "page", "document.querySelectorAll('#chips .chip').length > 0", ask, STATISTICS)


def trained(folder: Path) -> None:
    """Train the adapter unless it is there."""
    if not (folder / "adapters" / "reviews" / "loralab.json").exists():
        run(TRAIN, folder)


def run(command: str, folder: Path) -> None:
    """Run a command of loralab in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    print(f"loralab {command}", file=sys.stderr, flush=True)
    if code := subprocess.call([sys.executable, "-m", "loralab", *shlex.split(command)], cwd=folder):
        sys.exit(code)


def photograph(
    address: str, name: str, ready: str, act: Callable[[Page], None] = lambda _: None, end: str = "innerHeight"
) -> None:
    """Write what a browser shows of an address once `ready` is true, down to `end` pixels, light and dark."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or sys.exit("there is no chromium here")
    for scheme in SCHEMES:
        with tempfile.TemporaryDirectory() as profile, browsing(chromium, address, Path(profile), **SIZE) as shown:
            shown.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            shown.until(ready)
            act(shown)
            shown.until("document.fonts.status === 'loaded'")
            shown.value("document.documentElement.style.scrollbarWidth = 'none'")
            shown.value("scrollTo({ top: 0, behavior: 'instant' })")
            clip = {"x": 0, "y": 0, "width": SIZE["width"], "height": shown.value(end), "scale": 1}
            shot = shown.ask("Page.captureScreenshot", format="png", clip=clip)
        write(f"{name}-{scheme}.png", b64decode(shot["data"]))


def ask(page: Page) -> None:
    """Ask the base and the adapter the same."""
    page.type("#prompt", REVIEW)
    page.click("#run")
    page.until(SHOWN)


def write(name: str, content: bytes) -> None:
    """Write a picture that is not too large for a README."""
    if len(content) > LARGEST:
        sys.exit(f"{name} has {len(content):,} bytes, more than {LARGEST:,}")
    (OUTPUT / name).write_bytes(content)
    print(f"{name}  {len(content) / 1000:.0f} KB")


if __name__ == "__main__":
    main()
