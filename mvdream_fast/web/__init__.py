"""The page that `serve` shows to a person: what it shows of a queue, what it lets in, and the page itself."""
