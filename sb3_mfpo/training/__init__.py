"""What makes of networks and equations a Stable-Baselines3 algorithm."""
