"""Many runs over many devices: a queue on shared files, workers that take jobs from it, pages that show them."""
