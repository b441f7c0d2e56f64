"""DreamBooth on photos, and DreamBooth3D's stages."""
