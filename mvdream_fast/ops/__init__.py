"""The public fused ops: each with a plain-torch reference beside it; ops hold no weights and know no model."""

# Imported eagerly: a lazily loaded submodule would shadow the function of the same name. Triton and the native
# extension are loaded inside the ops, on first use.
