// nvcc's qualifiers of functions, which mean nothing to other compilers.
#pragma once

#if !defined(__CUDACC__) && !defined(__host__)
#define __host__
#define __device__
#endif
