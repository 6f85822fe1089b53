"""Every parser of foreign bytes, fed with bytes that nobody thought of: ``targets`` names them, ``child`` feeds one of them."""
