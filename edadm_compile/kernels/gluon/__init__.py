"""Device code in Gluon: sm_90 with matrix products that stay in flight."""
