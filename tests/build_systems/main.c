/* Runs two models that were compiled by hwopt, in one program. */
#include <stdio.h>

#include "other.h"
#include "small.h"

static float image[3 * 8 * 8], classes[4], features[6], result[2];

int main(void) {
  for (int i = 0; i < 3 * 8 * 8; ++i) image[i] = (float)(i % 7) / 7.0f;
  for (int i = 0; i < 6; ++i) features[i] = (float)i;
  int code = small_run(image, classes, NULL);
  if (!code) code = other_run(features, result, NULL);
  if (code) {
    fprintf(stderr, "%s\n", small_error(code));
    return 1;
  }
  for (int i = 0; i < 4; ++i) printf("%.9g\n", (double)classes[i]);
  for (int i = 0; i < 2; ++i) printf("%.9g\n", (double)result[i]);
  return 0;
}
