"""The runtime: a memory plan, resident units, prefetch, and transformers modules on top of them."""
