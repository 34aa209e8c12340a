// What a source is written for. kernels.py says it; these values stand in where a header is opened by itself.
#pragma once
#ifndef DK
#define GATED 1  // whether states decay
#define DELTA 1  // whether values are corrected by what their keys retrieve
#define DK 64    // channels of a key
#define DV 64    // and of a value
#endif
