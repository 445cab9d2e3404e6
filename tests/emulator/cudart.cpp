// A CUDA runtime whose kernels do nothing: device memory is lazily mapped host memory, copies of up
// to 1 MB are real, launches, copies and waits are counted. Torch's CUDA build then runs its real
// dispatch, allocator, streams and threads.
#include <atomic>
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <map>
#include <mutex>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <sys/mman.h>
#include <unordered_map>
#include <vector>
static std::mutex M;
static std::unordered_map<const void *, std::string> &names() {
  static auto *x = new std::unordered_map<const void *, std::string>;
  return *x;
}
static std::map<std::string, long> &counts() {
  static auto *x = new std::map<std::string, long>;
  return *x;
}
static std::map<std::string, double> &sums() {
  static auto *x = new std::map<std::string, double>;
  return *x;
}
static std::map<char *, size_t> &dev() {
  static auto *x = new std::map<char *, size_t>;
  return *x;
}
static std::map<char *, size_t> &host() {
  static auto *x = new std::map<char *, size_t>;
  return *x;
}
static thread_local int paused = 0;
static size_t used = 0, pinned = 0;
static size_t total = (size_t)81079ULL << 20;
static void hit(const std::string &n, double s = 0) {
  if (paused)
    return;
  std::lock_guard<std::mutex> g(M);
  counts()[n]++;
  if (s)
    sums()[n] += s;
}
extern "C" {
void nullgpu_reset() {
  std::lock_guard<std::mutex> g(M);
  counts().clear();
  sums().clear();
}
void nullgpu_pause(int d) { paused += d; }
void nullgpu_hit(const char *n) { hit(n); }
void nullgpu_total(size_t bytes) { total = bytes; }
size_t nullgpu_pinned() { return pinned; }
void nullgpu_dump(const char *path) {
  std::lock_guard<std::mutex> g(M);
  FILE *f = fopen(path, "w");
  for (auto &p : counts())
    fprintf(f, "%ld\t%.6g\t%s\n", p.second, sums().count(p.first) ? sums()[p.first] : 0.0,
            p.first.c_str());
  fclose(f);
}

// ---- registration and launches
void **__cudaRegisterFatBinary(void *) {
  static void *p;
  return &p;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction(void **, const char *h, char *, const char *name, int, uint3 *, uint3 *,
                            dim3 *, dim3 *, int *) {
  std::lock_guard<std::mutex> g(M);
  names()[h] = name;
}
void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
char __cudaInitModule(void **) { return 1; }
struct Conf {
  dim3 g, b;
  size_t s;
  void *st;
};
static thread_local std::vector<Conf> confs;
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t s, struct CUstream_st *st) {
  confs.push_back({g, b, s, st});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *s, void *st) {
  auto c = confs.back();
  confs.pop_back();
  *g = c.g;
  *b = c.b;
  *s = c.s;
  *(void **)st = c.st;
  return cudaSuccess;
}
static cudaError_t launch(const void *f) {
  std::string n;
  {
    std::lock_guard<std::mutex> g(M);
    auto it = names().find(f);
    n = it == names().end() ? "?" : it->second;
  }
  hit("K " + n);
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *k, const void *f) {
  *k = (cudaKernel_t)f;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3, dim3, void **, size_t, cudaStream_t) {
  return launch((const void *)k);
}
cudaError_t cudaLaunchKernel(const void *f, dim3, dim3, void **, size_t, cudaStream_t) {
  return launch(f);
}
cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3, dim3, void **, size_t, cudaStream_t) {
  return launch(f);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *, const void *f, void **) {
  return launch(f);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t fn, void *u) {
  hit("hostfunc");
  fn(u);
  return cudaSuccess;
}
// ---- device
cudaError_t cudaGetDeviceCount(int *n) {
  *n = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int *d) {
  *d = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H100 80GB HBM3 (null)");
  p->totalGlobalMem = total;
  p->sharedMemPerBlock = 49152;
  p->regsPerBlock = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = 1024;
  p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = 65535;
  p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = 9;
  p->minor = 0;
  p->textureAlignment = 512;
  p->multiProcessorCount = 132;
  p->unifiedAddressing = 1;
  p->memoryBusWidth = 5120;
  p->l2CacheSize = 52428800;
  p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerMultiprocessor = 65536;
  p->managedMemory = 1;
  p->concurrentManagedAccess = 1;
  p->cooperativeLaunch = 1;
  p->sharedMemPerBlockOptin = 232448;
  p->maxBlocksPerMultiProcessor = 32;
  p->asyncEngineCount = 3;
  p->concurrentKernels = 1;
  p->canMapHostMemory = 1;
  p->streamPrioritiesSupported = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *v, cudaDeviceAttr a, int) {
  switch ((int)a) {
  case cudaDevAttrMultiProcessorCount:
    *v = 132;
    break;
  case cudaDevAttrComputeCapabilityMajor:
    *v = 9;
    break;
  case cudaDevAttrComputeCapabilityMinor:
    *v = 0;
    break;
  case cudaDevAttrMaxSharedMemoryPerBlockOptin:
    *v = 232448;
    break;
  case cudaDevAttrMaxSharedMemoryPerBlock:
    *v = 49152;
    break;
  case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
    *v = 233472;
    break;
  case cudaDevAttrMaxThreadsPerBlock:
    *v = 1024;
    break;
  case cudaDevAttrWarpSize:
    *v = 32;
    break;
  case cudaDevAttrMaxThreadsPerMultiProcessor:
    *v = 2048;
    break;
  case cudaDevAttrMaxGridDimX:
    *v = 2147483647;
    break;
  case cudaDevAttrMaxGridDimY:
    *v = 65535;
    break;
  case cudaDevAttrMaxGridDimZ:
    *v = 65535;
    break;
  case cudaDevAttrMaxBlockDimX:
    *v = 1024;
    break;
  case cudaDevAttrMaxBlockDimY:
    *v = 1024;
    break;
  case cudaDevAttrMaxBlockDimZ:
    *v = 64;
    break;
  case cudaDevAttrMaxRegistersPerBlock:
    *v = 65536;
    break;
  case cudaDevAttrMaxRegistersPerMultiprocessor:
    *v = 65536;
    break;
  case cudaDevAttrL2CacheSize:
    *v = 52428800;
    break;
  case cudaDevAttrMaxBlocksPerMultiprocessor:
    *v = 32;
    break;
  case cudaDevAttrClockRate:
    *v = 1980000;
    break;
  default:
    *v = 1;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int) {
  snprintf(s, n, "0000:00:01.0");
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *l, int *g) {
  if (l)
    *l = 0;
  if (g)
    *g = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *p, int) {
  *p = (cudaMemPool_t)1;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *c, int, int) {
  *c = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() {
  hit("S cudaDeviceSynchronize");
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *v) {
  *v = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *v) {
  *v = 13000;
  return cudaSuccess;
}
static int driver_nothing() { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *s, void **f, unsigned, unsigned long long,
                                             enum cudaDriverEntryPointQueryResult *r) {
  *f = (void *)driver_nothing;
  if (r)
    *r = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
const char *cudaGetErrorName(cudaError_t e) {
  return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError";
}
const char *cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorMemoryAllocation ? "out of memory" : "null gpu";
}
static thread_local cudaError_t last = cudaSuccess;
cudaError_t cudaGetLastError() {
  auto e = last;
  last = cudaSuccess;
  return e;
}
cudaError_t cudaPeekAtLastError() { return last; }
// ---- memory
cudaError_t cudaMalloc(void **p, size_t n) {
  std::lock_guard<std::mutex> g(M);
  if (used + n > total) {
    last = cudaErrorMemoryAllocation;
    counts()["M cudaMalloc refused"]++;
    return cudaErrorMemoryAllocation;
  }
  size_t r = (n + 4095) & ~4095ULL;
  void *q = mmap(0, r, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (q == MAP_FAILED) {
    perror("mmap");
    return cudaErrorMemoryAllocation;
  }
  dev()[(char *)q] = r;
  used += n;
  counts()["M cudaMalloc"]++;
  *p = q;
  return cudaSuccess;
}
cudaError_t cudaFree(void *p) {
  if (!p)
    return cudaSuccess;
  std::lock_guard<std::mutex> g(M);
  auto it = dev().find((char *)p);
  if (it == dev().end())
    return cudaSuccess;
  munmap(p, it->second);
  used -= it->second;
  dev().erase(it);
  counts()["M cudaFree"]++;
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t) { return cudaFree(p); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned) {
  size_t r = (n + 4095) & ~4095ULL;
  void *q = mmap(0, r, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (q == MAP_FAILED)
    return cudaErrorMemoryAllocation;
  {
    std::lock_guard<std::mutex> g(M);
    host()[(char *)q] = r;
    pinned += n;
  }
  hit("M cudaHostAlloc", (double)n);
  *p = q;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void *p) {
  std::lock_guard<std::mutex> g(M);
  auto it = host().find((char *)p);
  if (it != host().end()) {
    munmap(p, it->second);
    pinned -= it->second;
    host().erase(it);
  }
  counts()["M cudaFreeHost"]++;
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void *, size_t, unsigned) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void *) { return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *f, size_t *t) {
  *f = total - used;
  *t = total;
  return cudaSuccess;
}
static bool in(std::map<char *, size_t> &m, const void *p) {
  auto it = m.upper_bound((char *)p);
  if (it == m.begin())
    return false;
  --it;
  return (char *)p < it->first + it->second;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  std::lock_guard<std::mutex> g(M);
  memset(a, 0, sizeof *a);
  if (in(dev(), p)) {
    a->type = cudaMemoryTypeDevice;
    a->devicePointer = (void *)p;
  } else if (in(host(), p)) {
    a->type = cudaMemoryTypeHost;
    a->hostPointer = (void *)p;
    a->devicePointer = (void *)p;
  } else
    a->type = cudaMemoryTypeUnregistered;
  return cudaSuccess;
}
static const char *kind(const void *d, const void *s) {
  std::lock_guard<std::mutex> g(M);
  bool a = in(dev(), d), b = in(dev(), s);
  bool hp = in(host(), a ? s : d);
  if (a && b)
    return "D2D";
  if (a)
    return hp ? "H2D pinned" : "H2D pageable";
  if (b)
    return hp ? "D2H pinned" : "D2H pageable";
  return "H2H";
}
static void copy(void *d, const void *s, size_t n) {
  if (n <= (1u << 20))
    memmove(d, s, n);
}
cudaError_t cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind) {
  hit(std::string("C cudaMemcpy ") + kind(d, s), n);
  copy(d, s, n);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind, cudaStream_t) {
  std::string k = kind(d, s);
  hit("C cudaMemcpyAsync " + k, n);
  if (k != "D2D" || n <= (1u << 20))
    copy(d, s, n);
  return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void *, int, const void *, int, size_t n, cudaStream_t) {
  hit("C peer", n);
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void *d, size_t dp, const void *s, size_t sp, size_t w, size_t h,
                              enum cudaMemcpyKind, cudaStream_t) {
  hit(std::string("C cudaMemcpy2DAsync ") + kind(d, s), w * h);
  for (size_t i = 0; i < h; i++)
    memmove((char *)d + i * dp, (const char *)s + i * sp, w);
  return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void *, const void *, size_t, size_t, enum cudaMemcpyKind) {
  return cudaSuccess;
}
cudaError_t cudaMemset(void *p, int v, size_t n) {
  hit("C cudaMemset", n);
  if (n <= (1u << 20))
    memset(p, v, n);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *p, int v, size_t n, cudaStream_t) {
  hit("C cudaMemsetAsync", n);
  if (n <= (1u << 20))
    memset(p, v, n);
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **p, const void *s) {
  *p = (void *)s;
  return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, enum cudaMemPoolAttr, void *v) {
  *(unsigned long long *)v = 0;
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, enum cudaMemPoolAttr, void *) {
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const struct cudaMemAccessDesc *, size_t) {
  return cudaSuccess;
}
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
// ---- streams, events
static std::atomic<size_t> handle{0x1000};
cudaError_t cudaStreamCreate(cudaStream_t *s) {
  *s = (cudaStream_t)(handle += 64);
  hit("stream create");
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned, int) {
  return cudaStreamCreate(s);
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int *p) {
  *p = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  hit("S cudaStreamSynchronize");
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
  hit("E cudaStreamWaitEvent");
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *u, unsigned) {
  f(s, cudaSuccess, u);
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, enum cudaStreamCaptureMode) { return cudaSuccess; }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *g) {
  *g = (cudaGraph_t)1;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, enum cudaStreamCaptureStatus *st,
                                     unsigned long long *id, cudaGraph_t *g,
                                     const cudaGraphNode_t **d, const cudaGraphEdgeData **e,
                                     size_t *n) {
  if (st)
    *st = cudaStreamCaptureStatusNone;
  if (id)
    *id = 0;
  if (g)
    *g = 0;
  if (d)
    *d = 0;
  if (e)
    *e = 0;
  if (n)
    *n = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, enum cudaStreamCaptureStatus *st) {
  *st = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *) {
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) {
  *e = (cudaEvent_t)(handle += 64);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { return cudaEventCreate(e); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
  hit("E cudaEventRecord");
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) {
  hit("E cudaEventRecord");
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
  hit("S cudaEventSynchronize");
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *t, cudaEvent_t, cudaEvent_t) {
  *t = 0.01f;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->ptxVersion = 90;
  a->binaryVersion = 90;
  a->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, enum cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *, int, size_t) {
  *n = 2;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *, int,
                                                                   size_t, unsigned) {
  *n = 2;
  return cudaSuccess;
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }
// ---- cuBLAS
static const char *typ(cudaDataType t) {
  return t == CUDA_R_16BF  ? "bf16"
         : t == CUDA_R_16F ? "fp16"
         : t == CUDA_R_32F ? "fp32"
         : t == CUDA_R_64F ? "fp64"
                           : "other";
}
static void gemm(const char *w, const char *t, double m, double n, double k, double b) {
  hit(std::string("K gemm ") + t, 2 * m * n * k * b);
  {
    std::lock_guard<std::mutex> g(M);
  }
}
cublasStatus_t cublasCreate_v2(cublasHandle_t *h) {
  *h = (cublasHandle_t)(handle += 64);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetStream_v2(cublasHandle_t, cudaStream_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void *, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t *m) {
  *m = CUBLAS_DEFAULT_MATH;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t, cublasPointerMode_t) {
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t *m) {
  *m = CUBLAS_POINTER_MODE_HOST;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n,
                            int k, const void *, const void *, cudaDataType a, int, const void *,
                            cudaDataType, int, const void *, void *, cudaDataType, int,
                            cublasComputeType_t, cublasGemmAlgo_t) {
  gemm("", typ(a), m, n, k, 1);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t, cublasOperation_t,
                                          int m, int n, int k, const void *, const void *,
                                          cudaDataType a, int, long long, const void *,
                                          cudaDataType, int, long long, const void *, void *,
                                          cudaDataType, int, long long, int b, cublasComputeType_t,
                                          cublasGemmAlgo_t) {
  gemm("b", typ(a), m, n, k, b);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSgemm_v2(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n,
                              int k, const float *, const float *, int, const float *, int,
                              const float *, float *, int) {
  gemm("", "fp32", m, n, k, 1);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t, cublasOperation_t, cublasOperation_t,
                                         int m, int n, int k, const float *, const float *, int,
                                         long long, const float *, int, long long, const float *,
                                         float *, int, long long, int b) {
  gemm("b", "fp32", m, n, k, b);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDgemm_v2(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n,
                              int k, const double *, const double *, int, const double *, int,
                              const double *, double *, int) {
  gemm("", "fp64", m, n, k, 1);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSgemv_v2(cublasHandle_t, cublasOperation_t, int m, int n, const float *,
                              const float *, int, const float *, int, const float *, float *, int) {
  gemm("v", "fp32", m, n, 1, 1);
  return CUBLAS_STATUS_SUCCESS;
}
size_t cublasLtGetVersion() { return 130100; }
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t,
                                        cudaDataType_t) {
  *d = (cublasLtMatmulDesc_t)1;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t,
                                              const void *, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}
struct Lay {
  cudaDataType t;
  uint64_t r, c;
};
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType t, uint64_t r,
                                          uint64_t c, int64_t) {
  *l = (cublasLtMatrixLayout_t) new Lay{t, r, c};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
  delete (Lay *)l;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t,
                                                cublasLtMatrixLayoutAttribute_t, const void *,
                                                size_t) {
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) {
  *p = (cublasLtMatmulPreference_t)1;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t) {
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t,
                                                    cublasLtMatmulPreferenceAttributes_t,
                                                    const void *, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int,
                                              cublasLtMatmulHeuristicResult_t *r, int *n) {
  memset(r, 0, sizeof *r);
  r->state = CUBLAS_STATUS_SUCCESS;
  *n = 1;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t, const void *, const void *,
                              cublasLtMatrixLayout_t A, const void *, cublasLtMatrixLayout_t B,
                              const void *, const void *, cublasLtMatrixLayout_t, void *,
                              cublasLtMatrixLayout_t D, const cublasLtMatmulAlgo_t *, void *,
                              size_t, cudaStream_t) {
  auto *a = (Lay *)A;
  auto *d = (Lay *)D;
  double k = a->r == d->r ? a->c : a->r;
  hit(std::string("K gemmLt ") + typ(a->t), 2.0 * d->r * d->c * k);
  return CUBLAS_STATUS_SUCCESS;
}
// ---- cuDNN: there, but no plan of it is ever made
size_t cudnnGetVersion() { return 91900; }
size_t cudnnGetCudartVersion() { return 13000; }
int cudnnCreate(void **h) {
  *h = (void *)1;
  return 0;
}
int cudnnSetStream(void *, void *) { return 0; }
}
