"""heldout.py TEXTS OUT: a quarter of each text to calibrate on, three others to measure with."""
import sys
from pathlib import Path
texts, out = Path(sys.argv[1]), Path(sys.argv[2])
for path in sorted(texts.glob("*.txt")):
    text = path.read_text()
    n = len(text) // 4
    for i in range(4):
        folder = out / ("known" if i == 0 else "held"); folder.mkdir(parents=True, exist_ok=True)
        (folder / (path.name if i == 0 else f"{path.stem}-{i}.txt")).write_text(text[i * n : (i + 1) * n])
