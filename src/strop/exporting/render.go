// Renders conversations with a template as Ollama does: Go's text/template, given .System, .Messages and .Response.
// stdin: {"template": "...", "conversations": [[{"role": "user", "content": "..."}]]}; stdout: the prompts as a list.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	var asked struct {
		Template      string
		Conversations [][]message
	}
	check(json.NewDecoder(os.Stdin).Decode(&asked))
	parsed, err := template.New("").Option("missingkey=zero").Parse(asked.Template)
	check(err)
	prompts := []string{}
	for _, messages := range asked.Conversations {
		var system []string
		for _, said := range messages {
			if said.Role == "system" {
				system = append(system, said.Content)
			}
		}
		var prompt strings.Builder
		check(parsed.Execute(&prompt, map[string]any{
			"System": strings.Join(system, "\n\n"), "Messages": messages, "Response": "",
		}))
		prompts = append(prompts, prompt.String())
	}
	out := json.NewEncoder(os.Stdout)
	out.SetEscapeHTML(false)
	check(out.Encode(prompts))
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
