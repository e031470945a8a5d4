#pragma once

/// Marks what libtacext.so offers to others; everything else stays hidden.
#define TACEXT_API __attribute__((visibility("default")))
