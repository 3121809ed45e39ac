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

extern "C" __global__ void shift(long long count, long long modes, long long height, long long width, const REAL* spectra,
                                 const REAL* ramp_y, const REAL* ramp_x, REAL* out) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  long long x = i % width, y = (i / width) % height, j = i / (modes * height * width);
  const REAL* a = ramp_y + 2 * (j * height + y);
  const REAL* b = ramp_x + 2 * (j * width + x);
  const REAL* s = spectra + 2 * (i % (modes * height * width));
  REAL re = a[0] * b[0] - a[1] * b[1], im = a[0] * b[1] + a[1] * b[0];
  out[2 * i] = s[0] * re - s[1] * im;
  out[2 * i + 1] = s[0] * im + s[1] * re;
}

extern "C" __global__ void shift_adjoint(long long count, long long modes, long long height, long long width,
                                         const REAL* spectra, const REAL* ramp_y, const REAL* ramp_x, REAL* out) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  long long x = i % width, y = (i / width) % height, j = i / (modes * height * width);
  long long at = i % (modes * height * width);
  const REAL* a = ramp_y + 2 * (j * height + y);
  const REAL* b = ramp_x + 2 * (j * width + x);
  REAL re = a[0] * b[0] - a[1] * b[1], im = a[0] * b[1] + a[1] * b[0];
  atomicAdd(out + 2 * at, spectra[2 * i] * re + spectra[2 * i + 1] * im);
  atomicAdd(out + 2 * at + 1, spectra[2 * i + 1] * re - spectra[2 * i] * im);
}

extern "C" __global__ void residual(long long count, long long modes, long long height, long long width, long long rows,
                                    long long columns, const REAL* counts, const bool* mask, long long lit,
                                    const REAL* background, long long wanted, REAL* background_gradient,
                                    long long poisson, REAL offset, REAL* spectra, double* losses) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  long long pixels = height * width, j = i / pixels, y = (i / width) % height, x = i % width;
  REAL factor = 0;
  // Zero frequency first on both: the low half of the detector, a gap, the negative half.
  bool inside = (y < (rows + 1) / 2 || y >= height - rows / 2) && (x < (columns + 1) / 2 || x >= width - columns / 2);
  REAL* first = spectra + 2 * (j * modes * pixels + y * width + x);
  if (inside) {
    long long row = y < (rows + 1) / 2 ? y : y - (height - rows), column = x < (columns + 1) / 2 ? x : x - (width - columns);
    long long at = row * columns + column;
    REAL measured = counts[j * rows * columns + at];
    if (mask[at] && measured >= 0) {
      REAL model = lit ? background[at] : (REAL)0, loss;
      for (long long m = 0; m < modes; ++m) {
        const REAL* s = first + 2 * m * pixels;
        model += s[0] * s[0] + s[1] * s[1];
      }
      if (poisson) {
        factor = 1 - (measured + offset) / (model + offset);
        loss = model - measured + (measured + offset) * log((measured + offset) / (model + offset));
      } else {
        REAL root = sqrt(model + offset), target = sqrt(measured + offset);
        factor = 1 - target / (root + (REAL)1e-9);
        loss = (root - target) * (root - target);
      }
      atomicAdd(losses + j, (double)loss);
      if (wanted) atomicAdd(background_gradient + at, factor);
    }
  }
  for (long long m = 0; m < modes; ++m) {
    first[2 * m * pixels] *= 2 * factor;
    first[2 * m * pixels + 1] *= 2 * factor;
  }
}
