// Values of a stack of slices between its pixels, on the device: one thread per site. REAL is the precision.

extern "C" __global__ void add_between(long long count, long long slices, long long rows, long long columns,
                                       const REAL* affine, const REAL* sites, const REAL* stack, REAL* out) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const REAL *site = sites + 3 * i;
  REAL at[3];
  for (int row = 0; row < 3; ++row) {
    const REAL* a = affine + 4 * row;
    at[row] = a[0] * site[0] + a[1] * site[1] + a[2] * site[2] + a[3];
  }
  REAL u = at[0], v = at[1], w = at[2];
  if (!(u >= 0 && v >= 0 && u <= (REAL)(columns - 1) && v <= (REAL)(rows - 1))) return;
  if (w < 0) w = 0;
  if (w > (REAL)(slices - 1)) w = (REAL)(slices - 1);
  long long left = (long long)floor(u), top = (long long)floor(v), first = (long long)floor(w);
  if (left > columns - 2) left = columns - 2;
  if (top > rows - 2) top = rows - 2;
  if (first > slices - 2) first = slices - 2;
  if (first < 0) first = 0;
  REAL by_u = u - (REAL)left, by_v = v - (REAL)top, by_w = w - (REAL)first, total = 0;
  for (int behind = 0; behind < 2 && behind < slices; ++behind) {
    REAL share = behind ? by_w : 1 - by_w;
    const REAL* upper = stack + ((first + behind) * rows + top) * columns + left;
    const REAL* lower = upper + columns;
    REAL above = upper[0] + by_u * (upper[1] - upper[0]), below = lower[0] + by_u * (lower[1] - lower[0]);
    total += share * (above + by_v * (below - above));
  }
  out[i] += total;
}
