// Gaussian atoms on an image, on the device: one thread per atom. REAL is the precision.

extern "C" __global__ void render_atoms(long long count, long long rows, long long columns, long long radius, const REAL* u,
                                        const REAL* v, const REAL* intensity, const REAL* width, REAL* image) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  long long left = (long long)floor(u[i] + (REAL)0.5) - radius, top = (long long)floor(v[i] + (REAL)0.5) - radius;
  REAL b = width[i], norm = intensity[i] / ((REAL)6.283185307179586 * b * b);
  for (long long y = top < 0 ? 0 : top; y <= top + 2 * radius && y < rows; ++y) {
    REAL ty = ((REAL)y - v[i]) / b, weight = norm * exp((REAL)-0.5 * ty * ty);
    for (long long x = left < 0 ? 0 : left; x <= left + 2 * radius && x < columns; ++x) {
      REAL tx = ((REAL)x - u[i]) / b;
      atomicAdd(image + y * columns + x, (REAL)(weight * exp((REAL)-0.5 * tx * tx)));
    }
  }
}

extern "C" __global__ void gather_atoms(long long count, long long rows, long long columns, long long radius, const REAL* u,
                                        const REAL* v, const REAL* intensity, const REAL* width, const REAL* residual,
                                        REAL* by_intensity, REAL* by_u, REAL* by_v, REAL* by_width) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  long long left = (long long)floor(u[i] + (REAL)0.5) - radius, top = (long long)floor(v[i] + (REAL)0.5) - radius;
  REAL b = width[i], norm = 1 / ((REAL)6.283185307179586 * b * b);
  REAL moment_0 = 0, moment_x = 0, moment_y = 0, moment_rr = 0;
  for (long long y = top < 0 ? 0 : top; y <= top + 2 * radius && y < rows; ++y) {
    REAL dy = (REAL)y - v[i], weight = norm * exp((REAL)-0.5 * dy * dy / (b * b));
    for (long long x = left < 0 ? 0 : left; x <= left + 2 * radius && x < columns; ++x) {
      REAL dx = (REAL)x - u[i];
      REAL value = weight * exp((REAL)-0.5 * dx * dx / (b * b)) * residual[y * columns + x];
      moment_0 += value;
      moment_x += value * dx;
      moment_y += value * dy;
      moment_rr += value * (dx * dx + dy * dy);
    }
  }
  by_intensity[i] = moment_0;
  by_u[i] = intensity[i] * moment_x / (b * b);
  by_v[i] = intensity[i] * moment_y / (b * b);
  by_width[i] = intensity[i] * (moment_rr / (b * b) - 2 * moment_0) / b;
}
