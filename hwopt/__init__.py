"""hwopt: a hardware-aware, compiler-style optimizer for trained models."""
