// Render conversations with a template like Ollama: Go's text/template with .System, .Messages and .Response.
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
	var request struct {
		Template      string
		Conversations [][]message
	}
	check(json.NewDecoder(os.Stdin).Decode(&request))
	parsed, err := template.New("").Option("missingkey=zero").Parse(request.Template)
	check(err)
	prompts := []string{}
	for _, messages := range request.Conversations {
		var system []string
		for _, m := range messages {
			if m.Role == "system" {
				system = append(system, m.Content)
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
