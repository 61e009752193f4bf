//! What a user types (`litefs.yml`) and what the code uses.
