// One block of frames on the device: sums under weights (a thread per line of a frame), and the summed and the brightest
// pattern (a thread per detector pixel and run of frames), and superpixels (a thread per frame and run of a line). Frames are read in the type they were recorded in.

template <class PIXEL>
__device__ __forceinline__ void weighted_line(long long count, const PIXEL* frames, const REAL* weights, long long masks,
                                              long long height, long long width, REAL* weighted) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const PIXEL* line = frames + i * width;
  long long row = i % height;
  for (long long k = 0; k < masks; ++k) {
    const REAL* weight = weights + (k * height + row) * width;
    double sum = 0;
    for (long long x = 0; x < width; ++x) sum += (double)line[x] * (double)weight[x];
    atomicAdd(weighted + (i / height) * masks + k, (REAL)sum);
  }
}

template <class PIXEL>
__device__ __forceinline__ void pattern_run(long long count, const PIXEL* frames, long long all, long long run, long long pixels,
                                            double* total, PIXEL* maximum) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  long long first = (i / pixels) * run, last = first + run < all ? first + run : all;
  const PIXEL* pixel = frames + first * pixels + i % pixels;
  double sum = 0;
  PIXEL brightest = *pixel;
  for (long long frame = first; frame < last; ++frame, pixel += pixels) {
    sum += (double)*pixel;
    if (*pixel > brightest) brightest = *pixel;
  }
  total[i] = sum;
  maximum[i] = brightest;
}

template <class PIXEL>
__device__ __forceinline__ void superpixel_run(long long count, const PIXEL* frames, const long long* runs, long long all,
                                               long long height, long long width, long long labels, REAL* binned) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const long long* run = runs + 4 * (i % all);
  long long frame = i / all;
  const PIXEL* line = frames + (frame * height + run[0]) * width;
  double sum = 0;
  for (long long x = run[1]; x < run[2]; ++x) sum += (double)line[x];
  atomicAdd(binned + frame * labels + run[3], (REAL)sum);
}

extern "C" __global__ void weighted_uint8(long long count, const unsigned char* frames, const REAL* weights, long long masks,
    long long height, long long width, REAL* weighted) {
  weighted_line(count, frames, weights, masks, height, width, weighted);
}

extern "C" __global__ void patterns_uint8(long long count, const unsigned char* frames, long long all, long long run,
    long long pixels, double* total, unsigned char* maximum) {
  pattern_run(count, frames, all, run, pixels, total, maximum);
}

extern "C" __global__ void weighted_uint16(long long count, const unsigned short* frames, const REAL* weights, long long masks,
    long long height, long long width, REAL* weighted) {
  weighted_line(count, frames, weights, masks, height, width, weighted);
}

extern "C" __global__ void patterns_uint16(long long count, const unsigned short* frames, long long all, long long run,
    long long pixels, double* total, unsigned short* maximum) {
  pattern_run(count, frames, all, run, pixels, total, maximum);
}

extern "C" __global__ void weighted_uint32(long long count, const unsigned int* frames, const REAL* weights, long long masks,
    long long height, long long width, REAL* weighted) {
  weighted_line(count, frames, weights, masks, height, width, weighted);
}

extern "C" __global__ void patterns_uint32(long long count, const unsigned int* frames, long long all, long long run,
    long long pixels, double* total, unsigned int* maximum) {
  pattern_run(count, frames, all, run, pixels, total, maximum);
}

extern "C" __global__ void weighted_float32(long long count, const float* frames, const REAL* weights, long long masks,
    long long height, long long width, REAL* weighted) {
  weighted_line(count, frames, weights, masks, height, width, weighted);
}

extern "C" __global__ void patterns_float32(long long count, const float* frames, long long all, long long run,
    long long pixels, double* total, float* maximum) {
  pattern_run(count, frames, all, run, pixels, total, maximum);
}

extern "C" __global__ void weighted_float64(long long count, const double* frames, const REAL* weights, long long masks,
    long long height, long long width, REAL* weighted) {
  weighted_line(count, frames, weights, masks, height, width, weighted);
}

extern "C" __global__ void patterns_float64(long long count, const double* frames, long long all, long long run,
    long long pixels, double* total, double* maximum) {
  pattern_run(count, frames, all, run, pixels, total, maximum);
}

extern "C" __global__ void superpixels_uint8(long long count, const unsigned char* frames, const long long* runs, long long all,
    long long height, long long width, long long labels, REAL* binned) {
  superpixel_run(count, frames, runs, all, height, width, labels, binned);
}

extern "C" __global__ void superpixels_uint16(long long count, const unsigned short* frames, const long long* runs, long long all,
    long long height, long long width, long long labels, REAL* binned) {
  superpixel_run(count, frames, runs, all, height, width, labels, binned);
}

extern "C" __global__ void superpixels_uint32(long long count, const unsigned int* frames, const long long* runs, long long all,
    long long height, long long width, long long labels, REAL* binned) {
  superpixel_run(count, frames, runs, all, height, width, labels, binned);
}

extern "C" __global__ void superpixels_float32(long long count, const float* frames, const long long* runs, long long all,
    long long height, long long width, long long labels, REAL* binned) {
  superpixel_run(count, frames, runs, all, height, width, labels, binned);
}

extern "C" __global__ void superpixels_float64(long long count, const double* frames, const long long* runs, long long all,
    long long height, long long width, long long labels, REAL* binned) {
  superpixel_run(count, frames, runs, all, height, width, labels, binned);
}
