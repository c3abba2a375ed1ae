"""NextLat pretraining on DeepSpeed: the model, its objectives, the engine, and what happens to a run."""
