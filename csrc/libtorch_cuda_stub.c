// Stands for libtorch_cuda.so when the kernels are linked, so that a CPU-only torch can build them: setup.py makes a
// library of that soname from this file, and at run time torch's own takes its place. It has what the kernels call
// there; the link fails (-z defs) where one is missing here.
void aoti_torch_create_cuda_guard(void) {}
void aoti_torch_cuda_guard_set_index(void) {}
void aoti_torch_delete_cuda_guard(void) {}
void aoti_torch_create_cuda_stream_guard(void) {}
void aoti_torch_delete_cuda_stream_guard(void) {}
void aoti_torch_get_current_cuda_stream(void) {}
