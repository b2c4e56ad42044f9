"""Cuts up.new's streams of 1 MiB into folders of the sizes wanted, splitting the one at each border."""
import hashlib, lzma, sys
from pathlib import Path
here = Path(__file__).parent
first = int(sys.argv[1])
data = b"".join((here / f"up.new/p{n}/piece0{n}.xz").read_bytes() for n in range(1, 10))
parts, raws, at = [], [], 0
while at < len(data):
    d = lzma.LZMADecompressor(); chunk = data[at : at + 1_300_000]; raw = d.decompress(chunk); assert d.eof
    size = len(chunk) - len(d.unused_data); parts.append(data[at : at + size]); raws.append(raw); at += size
whole = hashlib.sha256(b"".join(raws)).hexdigest()
total = sum(map(len, parts)); left = total; i = 0; out = {}
for n in range(1, 10):
    goal = first if n == 1 else -(-left // (10 - n)); piece = []; size = 0
    while i < len(parts) and (n == 9 or size + len(parts[i]) <= goal):
        piece.append(parts[i]); size += len(parts[i]); i += 1
    if n < 9 and i < len(parts):
        cut = int(len(raws[i]) * (goal - size) / len(parts[i])) // 4096 * 4096
        if cut > 0:
            a, b = raws[i][:cut], raws[i][cut:]
            piece.append(lzma.compress(a, preset=5)); size += len(piece[-1]); raws[i], parts[i] = b, lzma.compress(b, preset=5)
    left -= size; out[n] = b"".join(piece); print(n, len(out[n]), flush=True)
assert hashlib.sha256(b"".join(lzma.decompress(out[n]) for n in range(1, 10))).hexdigest() == whole
for n, each in out.items():
    (here / f"up.new/p{n}/piece0{n}.xz").write_bytes(each)
print("written")
