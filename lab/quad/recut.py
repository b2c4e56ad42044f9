"""recut.py [P1_BYTES]: joins up/p*/piece*, checks the two sums, cuts anew into up.new: p1 of at most P1_BYTES, p2 to p9 alike. xz streams of 1 MiB, joined."""
import hashlib, lzma, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
here = Path(__file__).parent
first = int(sys.argv[1]) if len(sys.argv) > 1 else 4_200_000
QWEN, ALL = 397804864, 496167296
raw = b"".join(lzma.decompress(f.read_bytes()) if f.suffix == ".xz" else f.read_bytes() for f in sorted((here / "up").glob("p*/piece*")))
sums = {line.split()[1]: line.split()[0] for line in (here / "s/sums").read_text().splitlines()}
assert len(raw) == ALL, len(raw)
names = list(sums)
assert hashlib.sha256(raw[:QWEN]).hexdigest() == sums[names[0]], "Qwen"
assert hashlib.sha256(raw[QWEN:]).hexdigest() == sums[names[1]], "Smol"
print("old pieces are whole", flush=True)
MB = 1 << 20
with ThreadPoolExecutor(2) as pool:
    parts = list(pool.map(lambda i: lzma.compress(raw[i : i + MB], preset=5), range(0, ALL, MB)))
total = sum(map(len, parts)); print("compressed", total, flush=True)
cuts, at, left = [], 0, total
for n in range(1, 10):
    goal = first if n == 1 else -(-left // (10 - n))
    piece = []; size = 0
    while at < len(parts) and (n == 9 or size + len(parts[at]) <= goal + (0 if n == 1 else 60_000)):
        size += len(parts[at]); piece.append(parts[at]); at += 1
    left -= size
    folder = here / f"up.new/p{n}"; folder.mkdir(parents=True, exist_ok=True)
    (folder / f"piece0{n}.xz").write_bytes(b"".join(piece)); print(n, size, flush=True)
back = b"".join(lzma.decompress((here / f"up.new/p{n}/piece0{n}.xz").read_bytes()) for n in range(1, 10))
print("same" if back == raw else "DIFFERS")
