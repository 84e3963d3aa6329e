// The code of a block's largest element before random bits are added to it: with one above MAX, some would make it wrap
// around to 0.
#define AS_INEXACT_AS_A_GPU
#include "cuda_on_host.h"

#include "../../ops/blockwise.h"
#include "../../ops/cuda/approximate.cuh"

using namespace ademamix;

template <class Format>
int check(const char* name) {
  const float code = Format::template encode<Format::POSITION_ZERO>(Approximate(1), Approximate(1)).value;
  const float largest = Format::POSITION_ZERO + Format::MAX;
  if (code == largest) return 0;
  std::printf("%s: %.9g, not %.9g\n", name, code, largest);
  return 1;
}

int main() {
  return check<SignedSqrt4>("SignedSqrt4") + check<FourthRoot>("FourthRoot") + check<FourthRoot4>("FourthRoot4");
}
