// Fused inner loops of multislice on the device: one thread per wave element. Complex numbers are REAL pairs (re, im).

extern "C" __global__ void transmit(long long count, long long height, long long width, long long rows, long long columns,
                                    const long long* corners, const REAL* transmission, const REAL* waves, REAL* out) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  long long j = i / (height * width), y = (i / width) % height, x = i % width;
  long long row = (corners[2 * j] + y) % rows, column = (corners[2 * j + 1] + x) % columns;
  if (row < 0) row += rows;
  if (column < 0) column += columns;
  const REAL* t = transmission + 2 * (row * columns + column);
  REAL re = waves[2 * i], im = waves[2 * i + 1];
  out[2 * i] = re * t[0] - im * t[1];
  out[2 * i + 1] = re * t[1] + im * t[0];
}

extern "C" __global__ void transmit_adjoint(long long count, long long height, long long width, long long rows, long long columns,
                                            const long long* corners, const REAL* transmission, const REAL* incident,
                                            REAL* gradient, REAL* object_gradient) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  long long j = i / (height * width), y = (i / width) % height, x = i % width;
  long long row = (corners[2 * j] + y) % rows, column = (corners[2 * j + 1] + x) % columns;
  if (row < 0) row += rows;
  if (column < 0) column += columns;
  long long at = 2 * (row * columns + column);
  REAL re = gradient[2 * i], im = gradient[2 * i + 1];
  REAL wr = incident[2 * i], wi = incident[2 * i + 1];
  atomicAdd(object_gradient + at, wr * re + wi * im);
  atomicAdd(object_gradient + at + 1, wr * im - wi * re);
  REAL tr = transmission[at], ti = transmission[at + 1];
  gradient[2 * i] = re * tr + im * ti;
  gradient[2 * i + 1] = im * tr - re * ti;
}

extern "C" __global__ void illuminate(long long count, long long height, long long width, long long rows, long long columns,
                                      const long long* corners, const REAL* waves, REAL* illumination) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  long long j = i / (height * width), y = (i / width) % height, x = i % width;
  long long row = (corners[2 * j] + y) % rows, column = (corners[2 * j + 1] + x) % columns;
  if (row < 0) row += rows;
  if (column < 0) column += columns;
  REAL re = waves[2 * i], im = waves[2 * i + 1];
  atomicAdd(illumination + row * columns + column, re * re + im * im);
}

extern "C" __global__ void residual(long long count, REAL* spectra, const REAL* counts, double* losses, long long pixels,
                                    long long poisson, REAL offset) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  REAL re = spectra[2 * i], im = spectra[2 * i + 1], measured = counts[i];
  REAL model = re * re + im * im, factor = 0, loss = 0;
  if (measured >= 0) {
    if (poisson) {
      factor = 1 - (measured + offset) / (model + offset);
      loss = model - measured + (measured + offset) * log((measured + offset) / (model + offset));
    } else {
      REAL root = sqrt(model + offset), target = sqrt(measured + offset);
      factor = 1 - target / (root + (REAL)1e-9);
      loss = (root - target) * (root - target);
    }
  }
  atomicAdd(losses + i / pixels, (double)loss);
  spectra[2 * i] = 2 * factor * re;
  spectra[2 * i + 1] = 2 * factor * im;
}
