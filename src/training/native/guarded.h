// How functions that Rust calls report what was thrown: null, or the message, for the caller to free.
#pragma once

#include <cstring>
#include <exception>

template <typename F>
char* guarded(F work) {
    try {
        work();
        return nullptr;
    } catch (const std::exception& error) {
        return strdup(error.what());
    } catch (...) {
        return strdup("an unknown C++ exception");
    }
}
