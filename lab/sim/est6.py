import sys, est, est5
from est5 import *
Z=lambda **o: (multi,dict(kq='zero',**o))
est5.E5.clear()
est5.E5.update({'before 8/4':(pl,{}),'x1.5':Z(mul=1.5),'x3':Z(mul=3.),'x4':Z(mul=4.),'x5':Z(mul=5.),'x6':Z(mul=6.),'x3 k2.2':Z(mul=3.,knee=2.2),'x4 k2.2':Z(mul=4.,knee=2.2),'x4 k1.4':Z(mul=4.,knee=1.4),'4/4 x4':Z(mb=4,mul=4.)})
for f in sys.argv[1:]: tails(f)
