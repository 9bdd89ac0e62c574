"""One image to many views, in colour and normals (Wonder3D family)."""
