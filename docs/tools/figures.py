"""Draw the images of docs/figures.md by running the page's own code.

python docs/tools/figures.py
"""

import os
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the code in the folder of the page's images, and delete images that it does not show."""
    text = (DOCS / "figures.md").read_text(encoding="utf-8")
    folder = DOCS / "images" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    namespace: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        exec(block, namespace)  # noqa: S102 - the page's own code
    shown = set(re.findall(r"images/figures/([\w-]+\.png)", text))
    for path in folder.iterdir():
        if path.name not in shown:
            path.unlink()


if __name__ == "__main__":
    main()
