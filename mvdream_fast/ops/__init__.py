"""The public fused ops: each with a plain-torch reference beside it; ops hold no weights and know no model."""
