/* The least that a projector of two taps about y costs: weights shared by LANES neighbours along y, which are vectors.
   Volume [group][z][x][LANES], images [group][tilt][column][LANES]. */
#include <math.h>
#include <string.h>
#define LANES 16

void project(const float *volume, float *images, const float *cosines, const float *sines, int groups, int depth, int width,
             int tilts, int columns) {
  int half = width / 2;
  for (int group = 0; group < groups; ++group)
    for (int k = 0; k < tilts; ++k) {
      int steep = fabsf(cosines[k]) < fabsf(sines[k]);
      float inverse = 1.f / (steep ? sines[k] : cosines[k]), slope = (steep ? cosines[k] : sines[k]) * inverse;
      float scale = fabsf(inverse);
      float *image = images + (size_t)(group * tilts + k) * columns * LANES;
      const float *slab = volume + (size_t)group * depth * width * LANES;
      size_t across = (steep ? 1 : (size_t)width) * LANES, along = (steep ? (size_t)width : 1) * LANES;
      memset(image, 0, sizeof(float) * columns * LANES);
      for (int d = 0; d < (steep ? width : depth); ++d) {
        float offset = -(d - half) * slope - half * inverse + half;
        for (int u = 0; u < columns; ++u) {
          float x = u * inverse + offset;
          int i = (int)floorf(x);
          if (i < 0 || i >= width - 1) continue;
          float after = (x - i) * scale, before = scale - after;
          const float *a = slab + d * across + i * along, *b = a + along;
          float *q = image + u * LANES;
          for (int y = 0; y < LANES; ++y) q[y] += before * a[y] + after * b[y];
        }
      }
    }
}

void backproject(const float *images, float *volume, const float *cosines, const float *sines, int groups, int depth, int width,
                 int tilts, int columns) {
  int half = width / 2;
  for (int group = 0; group < groups; ++group)
    for (int z = 0; z < depth; ++z)
      for (int x = 0; x < width; ++x) {
        float sum[LANES] = {0};
        for (int k = 0; k < tilts; ++k) {
          float u = (x - half) * cosines[k] + (z - half) * sines[k] + half;
          int i = (int)floorf(u);
          if (i < 0 || i >= columns - 1) continue;
          float after = u - i, before = 1 - after;
          const float *a = images + ((size_t)(group * tilts + k) * columns + i) * LANES, *b = a + LANES;
          for (int y = 0; y < LANES; ++y) sum[y] += before * a[y] + after * b[y];
        }
        memcpy(volume + ((size_t)(group * depth + z) * width + x) * LANES, sum, sizeof sum);
      }
}
