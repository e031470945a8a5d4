#pragma once

/// Marks what libtacext_core.so and libtacext.so offer to others; everything else stays hidden.
#define TACEXT_API __attribute__((visibility("default")))
