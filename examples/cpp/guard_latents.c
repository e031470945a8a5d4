/* Guards latents that some inference engine has computed, in plain C.
 *
 *   guard_latents GUARD LATENTS LOGITS
 *
 * LATENTS and LOGITS are raw float32, row after row, as numpy's tofile writes them. Prints a line
 * for every row: score, p-value, and FLAGGED where it looks like a trigger. */
#include <stdio.h>
#include <stdlib.h>

#include "tacext/tacext.h"

/* The floats of a file; their number goes to *count. */
static float* read_floats(const char* path, size_t* count) {
  FILE* file = fopen(path, "rb");
  float* values = NULL;
  long size;
  *count = 0;
  if (file == NULL) return NULL;
  if (fseek(file, 0, SEEK_END) == 0 && (size = ftell(file)) > 0 && fseek(file, 0, SEEK_SET) == 0 &&
      (values = malloc((size_t)size)) != NULL)
    *count = fread(values, sizeof *values, (size_t)size / sizeof *values, file);
  fclose(file);
  return values;
}

int main(int argc, char** argv) {
  char message[512];
  tacext_guard* guard = NULL;
  float *latents, *logits, *score, *p_value;
  unsigned char* flagged;
  size_t latent_count, logit_count;
  int64_t rows, width, classes, i;
  if (argc != 4) {
    fprintf(stderr, "usage: guard_latents GUARD LATENTS LOGITS\n");
    return 4;
  }
  if (tacext_guard_load(argv[1], &guard, message, sizeof message) != TACEXT_OK) {
    fprintf(stderr, "error: %s\n", message);
    return 2;
  }
  width = tacext_guard_latents(guard);
  classes = tacext_guard_classes(guard);
  latents = read_floats(argv[2], &latent_count);
  logits = read_floats(argv[3], &logit_count);
  rows = (int64_t)logit_count / classes;
  if (rows == 0 || latent_count != (size_t)(rows * width) ||
      logit_count != (size_t)(rows * classes)) {
    fprintf(stderr, "error: expected rows of %lld latents and of %lld logits\n", (long long)width,
            (long long)classes);
    return 2;
  }
  score = malloc((size_t)rows * sizeof *score);
  p_value = malloc((size_t)rows * sizeof *p_value);
  flagged = malloc((size_t)rows);
  if (score == NULL || p_value == NULL || flagged == NULL) return 2;
  /* A row that is not finite is flagged, too; the message says which is the first. */
  if (tacext_guard_score(guard, latents, width, logits, classes, rows, score, p_value, flagged,
                         message, sizeof message) != TACEXT_OK)
    fprintf(stderr, "warning: %s\n", message);
  for (i = 0; i < rows; ++i)
    printf("%.9g %.9g%s\n", score[i], p_value[i], flagged[i] ? " FLAGGED" : "");
  free(score);
  free(p_value);
  free(flagged);
  free(latents);
  free(logits);
  tacext_guard_free(guard);
  return 0;
}
