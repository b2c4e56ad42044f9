import sys, est
from est2 import *
Z=lambda **o: (multi,dict(kq='zero',**o))
est.E_={'before 8/4':(plain,dict(mb=8,db=4)),'x1.5':Z(mul=1.5),'x3':Z(mul=3.),'x4':Z(mul=4.),'x5':Z(mul=5.),'x6':Z(mul=6.),'x4 k2.2':Z(mul=4.,knee=2.2),'x4 k1.4':Z(mul=4.,knee=1.4),'4/4 x4':Z(mb=4,mul=4.)}
for f in sys.argv[1:]: est.table(f)
