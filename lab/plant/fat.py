# fatbin entries of a library: (kind, size, hash of payload)
import struct,sys,hashlib,subprocess,collections
def entries(path):
    subprocess.run(['objcopy','-O','binary','--only-section=.nv_fatbin',path,'/tmp/plant/f.bin'],check=True)
    d=open('/tmp/plant/f.bin','rb').read(); p=0; out=[]
    while True:
        p=d.find(b'\x50\xed\x55\xba',p)
        if p<0: break
        ver,hs,fs=struct.unpack_from('<HHQ',d,p+4); q=p+hs; end=q+fs
        while q<end:
            kind,v,h,sz=struct.unpack_from('<HHIQ',d,q)
            out.append((kind,sz,hashlib.sha256(d[q+h:q+h+sz]).hexdigest()[:12])); q+=h+sz
        p=max(end,p+4)
    return out
a=entries(sys.argv[1])
for other in sys.argv[2:]:
    b=entries(other); ca,cb=collections.Counter(a),collections.Counter(b)
    print(other,len(a),len(b),'only first',list((ca-cb))[:5],'only other',list((cb-ca))[:5])
