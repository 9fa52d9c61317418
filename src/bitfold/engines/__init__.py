"""Engines that run artifacts and what is exported from them: each loads it as its users do, and is compared."""
