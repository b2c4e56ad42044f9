import sys; sys.path.insert(0,'/work/main')
import est
from est2 import *
from lite_attention.pages.layout import encode,decode
from lite_attention.pages.estimate import log_mass
def real(kp,q,bits):
    m=decode(encode(kp.transpose(0,1),bits),kp.shape[-1]) # n g d
    g,r,p,d=q.shape
    e=log_mass(q.flatten(1,2),m,torch.ones(g)).unflatten(1,(r,p))
    return e.float()
est.E_={'exact':(exact,{}),
 '8/4 before':(plain,dict(mb=8,db=4)),'real 12':(real,dict(bits=12)),
 '4/4 before':(plain,dict(mb=4,db=4)),'real 8':(real,dict(bits=8)),
 'perchan 8,4,4':(apart,dict(mb=8,db=4,kb=4)),
 'perchan unrounded':(multi,dict(mb=None,kb=None,groups=0)),
 'one unrounded':(multi,dict(mb=None,kb=None,groups=1)),
 'two keys 8/4':(multi,dict(mb=8,kb=4,keys=2,kq='zero')),
 'x1':(multi,dict(kq='zero')),
}
for f in sys.argv[1:]: est.table(f)
