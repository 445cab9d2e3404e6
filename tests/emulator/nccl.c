// NCCL: calls are counted, nothing is sent.
extern void nullgpu_hit(const char *);
#define COUNTED(name) int name() { nullgpu_hit("N " #name); return 0; }
COUNTED(ncclAllGather) COUNTED(ncclAllReduce) COUNTED(ncclAlltoAll) COUNTED(ncclBcast)
COUNTED(ncclBroadcast) COUNTED(ncclCommAbort) COUNTED(ncclCommDeregister) COUNTED(ncclCommDestroy)
COUNTED(ncclCommFinalize) COUNTED(ncclCommInitAll) COUNTED(ncclCommRegister) COUNTED(ncclCommShrink)
COUNTED(ncclCommWindowDeregister) COUNTED(ncclCommWindowRegister) COUNTED(ncclDevCommCreate)
COUNTED(ncclDevCommDestroy) COUNTED(ncclGetUniqueId) COUNTED(ncclGroupEnd) COUNTED(ncclGroupStart)
COUNTED(ncclMemFree) COUNTED(ncclRecv) COUNTED(ncclRedOpCreatePreMulSum) COUNTED(ncclRedOpDestroy)
COUNTED(ncclReduce) COUNTED(ncclReduceScatter) COUNTED(ncclSend)
int ncclCommCount(void *c, int *n) {
  *n = 1;
  return 0;
}
int ncclCommGetAsyncError(void *c, int *e) {
  *e = 0;
  return 0;
}
int ncclCommInitRank(void **c, ...) {
  *c = (void *)0x77;
  nullgpu_hit("N commInit");
  return 0;
}
int ncclCommInitRankConfig(void **c, ...) {
  *c = (void *)0x77;
  nullgpu_hit("N commInit");
  return 0;
}
int ncclCommInitRankScalable(void **c, ...) {
  *c = (void *)0x77;
  nullgpu_hit("N commInit");
  return 0;
}
int ncclCommSplit(void *c, int color, int key, void **n, ...) {
  *n = (void *)0x78;
  nullgpu_hit("N commSplit");
  return 0;
}
int ncclCommUserRank(void *c, int *n) {
  *n = 0;
  return 0;
}
const char *ncclGetErrorString(int e) { return "null nccl"; }
const char *ncclGetLastError(void *c) { return ""; }
int ncclGetVersion(int *v) {
  *v = 22809;
  return 0;
}
int ncclGroupSimulateEnd(void *i) { return 0; }
int ncclMemAlloc(void **p, unsigned long n) {
  *p = 0;
  return 1;
}
