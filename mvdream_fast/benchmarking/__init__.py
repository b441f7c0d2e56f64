"""What `make bench` measured: results files, the tables and the page made of them, and how two of them differ."""
