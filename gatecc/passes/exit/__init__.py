"""Exit: leave a model early, and what that alone needs: heads on earlier layers, rules when to leave."""
