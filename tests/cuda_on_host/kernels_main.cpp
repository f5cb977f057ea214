// Runs kernels at small shapes against a double reference: the program that the sanitizers watch. The checks of each
// operator are in kernels_<operator>.cpp; those that are linked run.
// Exit code 0 and "ok" where all values are right. Inputs are heap blocks of their exact size, so that
// AddressSanitizer sees one element too many. Argument: "small" for shapes that ThreadSanitizer can afford.
#include <cstring>
#include <exception>

#include "executor.h"
#include "kernels_check.h"

int main(int argc, char** argv) {
  const bool is_small = argc > 1 && std::strcmp(argv[1], "small") == 0;
  try {
    for (const auto check : tse::checks()) check(is_small);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  if (tse::failures != 0) {
    std::printf("%d values differ\n", tse::failures);
    return 1;
  }
#ifdef TSE_BANKS
  cuda_on_host::report_bank_conflicts();
#endif
  std::printf("ok\n");
}
