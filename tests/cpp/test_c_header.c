/* Uses the C interface as a C program does, against the shared library. */
#include <stdio.h>
#include <string.h>

#include "tacext/tacext.h"

int main(void) {
  const double weight[6] = {1, 0, 0, 1, -1, -1};
  double margins[9], s[6], norm[3];
  float logits[6] = {1, 0, -1, 0, 2, -1}, single[9];
  char message[200];
  tacext_guard* guard = NULL;
  int i;
  for (i = 0; i < 9; ++i) single[i] = -1e30f;
  if (tacext_pairwise_margin_max(logits, 3, 2, 3, single, message, sizeof message) != TACEXT_OK) {
    printf("%s\n", message);
    return 1;
  }
  for (i = 0; i < 9; ++i) margins[i] = single[i];
  if (tacext_minimal_perturbation(weight, margins, NULL, 3, 2, s, norm, NULL, NULL, message,
                                  sizeof message) != TACEXT_OK) {
    printf("%s\n", message);
    return 1;
  }
  if (!(norm[0] > 0 && norm[1] > 0 && norm[2] > 0)) return 2;
  if (tacext_guard_load("no such file", &guard, message, sizeof message) != TACEXT_BAD_FILE)
    return 3;
  if (guard != NULL || strstr(message, "no such file") == NULL) return 4;
  printf("tacext %s\n", tacext_version());
  return 0;
}
