"""PPO for language models: rollouts, rewards, advantages, losses and the loop, each readable on its own."""
