"""clk.py LOOP.txt [MUFU latency]: clocks of one warp alone from QK's end to the loop's end, without what it waits for."""
import re, sys
L = int(sys.argv[2]) if len(sys.argv) > 2 else 30
rows = []
for l in open(sys.argv[1]):
    m = re.match(r'([0-9a-f]{5}) s ?(\d+) (.) w(.) r(.) (......)  (.*)', l)
    if m: rows.append((int(m[1],16), int(m[2]), m[4], m[5], m[6], m[7]))
start = next(i for i, r in enumerate(rows) if 'DEPBAR.LE gsb0, 0x1' in r[5])
t = 0; sb = [0]*6; mufu = 0; marks = {}; skip = None
for addr, stall, w, r, wait, text in rows[start:]:
    if skip and addr < skip: continue
    skip = None
    for i in range(6):
        if wait[i] != '.': t = max(t, sb[i])
    if 'MUFU' in text:
        t = max(t, mufu); mufu = t + 8
    lat = L if 'MUFU' in text else 25
    if w != '-': sb[int(w)] = max(sb[int(w)], t + lat)
    if r != '-': sb[int(r)] = max(sb[int(r)], t + 12)
    if 'MUFU' in text: marks.setdefault('first MUFU', t); marks['last MUFU'] = t
    if 'DEPBAR.LE gsb0, 0x0' in text: marks['PV wait'] = t
    if 'F2FP' in text: marks.setdefault('first F2FP', t); marks['last F2FP'] = t
    m = re.search(r'@!?P\d+ BRA 0x([0-9a-f]+)', text)
    if m and '@!P0 BRA' in text and int(m[1],16) > addr and int(m[1],16) < rows[-1][0]: skip = int(m[1],16)  # nothing moved
    t += stall
print(sys.argv[1], 'MUFU latency', L, marks, 'end', t, 'instructions', len(rows))
